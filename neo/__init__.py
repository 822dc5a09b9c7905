"""neo: LLM serving for GPUs with too little memory, and the laboratory for its scheduling."""

__version__ = "0.1.0"
