"""Weights whose numbers are kept in blocks of few bits, as files hold them, and products with them."""
