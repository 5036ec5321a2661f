"""One vCPU of a simulated guest, a process with nothing of an engine or an SVSM, and what it and its guest both read."""
