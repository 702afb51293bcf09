"""Where the errors of a served checkpoint's linears come from, and what the regression makes of them."""
