-- Put a session's expiry off. ARGV: life. Returns 1, or 0 where there is none.
if redis.call('EXISTS', STATE) == 0 then
  return 0
end
redis.call('HSET', STATE, 'touched_ms', now_ms())
refresh()
return 1
