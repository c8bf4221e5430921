"""Pictures: drawn from arrays and geometry, with their rule, K and scale printed in them."""
