"""What `make evidence` trains and writes."""
