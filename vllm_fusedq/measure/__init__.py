"""What `fusedq quality` and `fusedq bench` measure: predictions in vLLM's engine, and speed."""
