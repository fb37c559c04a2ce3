"""`lowrank doctor`: probes of this machine and of what is installed."""
