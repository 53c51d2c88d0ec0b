"""FP8 and FP4: formats, which tensor has which, products with such operands, weights rounded from their masters."""
