"""What a dense model would become and cost, from headers and configs alone."""
