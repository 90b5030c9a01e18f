"""Embedding stores of other engines behind the same interface: Milvus, and FAISS indexes over the embedded store."""
