"""Embedding stores on other engines: Milvus, and FAISS indexes beside the embedded store."""
