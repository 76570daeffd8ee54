"""Text: documents, windows of tokens, and how well a model predicts them."""
