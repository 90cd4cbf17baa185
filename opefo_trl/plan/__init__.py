"""Does a recipe fit its machine? `opefo-trl plan` predicts memory, work and time of a step.

- `shapes`: the sizes of a model, from its config alone; number of parameters.
- `recipe`: the settings that matter, from train.py's options, and the machine, from accelerate's config.
- `memory`: bytes per GPU while training and while generating.
- `work`: tokens and FLOPs of a step, and a range for its time.

All arithmetic is pure functions of `Shape`, `Recipe` and `Machine`.
"""
