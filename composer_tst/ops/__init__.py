"""What superposition is made of, with torch alone: no Composer, and no state."""
