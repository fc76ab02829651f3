"""What `evidence.py` is made of."""
