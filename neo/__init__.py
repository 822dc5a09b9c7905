"""neo: LLM serving for GPUs with too little memory, and the laboratory in which its scheduling is designed."""

__version__ = "0.1.0"
