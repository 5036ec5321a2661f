"""A migration whose engine is another process: it shares mailbox memory and doorbells with the SVSM, and nothing else."""
