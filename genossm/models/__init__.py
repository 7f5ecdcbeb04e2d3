"""State-space encoders over DNA and the accessibility models made of them."""
