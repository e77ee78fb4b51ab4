"""What `ship` will take, before any of it is done: hours on this machine, memory and disk of every step."""
