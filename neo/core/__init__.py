"""The heart of neo, shared by the simulator and the engine. Standard library and numpy only."""
