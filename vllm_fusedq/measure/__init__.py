"""What `fusedq quality`, `bench` and `tune` measure: predictions in vLLM's engine, and speed."""
