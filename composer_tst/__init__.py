"""Token-Superposition Training for Composer and llm-foundry."""
