"""The parts of a training that `OPEFOTrainer` delegates to, one file for each."""
