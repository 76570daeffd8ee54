"""One more expert for a merged model: from its router statistics and the new model's texts."""
