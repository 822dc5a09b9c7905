"""The discrete-event simulator: the Scheduler on a virtual clock."""
