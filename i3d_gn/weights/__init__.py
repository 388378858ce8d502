"""Reading and writing anyone's weights, under our names."""
