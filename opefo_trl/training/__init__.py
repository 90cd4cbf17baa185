"""Components of training that `OPEFOTrainer` delegates to, one file each."""
