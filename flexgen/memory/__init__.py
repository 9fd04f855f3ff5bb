"""Memory tiers, lanes and transfers: where bytes are stored and how they move."""
