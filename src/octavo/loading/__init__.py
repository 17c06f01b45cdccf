"""What reads models: configurations, weights by name, what they recommend, the memory they need, fingerprints."""
