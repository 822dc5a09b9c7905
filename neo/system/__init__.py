"""What runs where, under which budgets and policy: shared by the simulator and the engine."""
