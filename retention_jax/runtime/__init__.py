"""Files, child processes, programs on disk: what a command needs of the machine it runs on."""
