"""Memory tiers, lanes and transfers: where bytes live and how they move."""
