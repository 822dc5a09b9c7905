"""Scheduling policies, one file each. ``neo.policy.registry`` finds them by name."""
