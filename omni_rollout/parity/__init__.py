"""The instrument: proves that rollout and trainer agree bit for bit, or names what makes them differ."""
