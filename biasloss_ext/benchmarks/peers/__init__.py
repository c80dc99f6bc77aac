"""What one would use instead of this package."""
