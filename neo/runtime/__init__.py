"""The engine: drives the same scheduler as the simulator, with a real clock and real memory."""
