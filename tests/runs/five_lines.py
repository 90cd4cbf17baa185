from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.playground import playground_dataset, playground_reward

args = OPEFOConfig("out/five-lines", max_steps=3, max_completion_length=12, use_cpu=True, bf16=False, report_to="none")
trainer = OPEFOTrainer("playground", playground_reward, args, train_dataset=playground_dataset())
trainer.train()
