"""What a run will need, computed before anybody asks for it."""
