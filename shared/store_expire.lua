-- Erase a session that has been idle for long enough. ARGV: life, idle milliseconds (0: whatever its state).
-- Returns {'erased' | 'alive' | 'missing', record}.
local touched = redis.call('HGET', STATE, 'touched_ms')
if not touched then
  redis.call('DEL', PROMPT, TOKENS, SPECULATION, LOGPROBS)
  return {'missing', {}}
end
local fields = record()
if now_ms() - touched < tonumber(ARGV[2]) then
  return {'alive', fields}
end
redis.call('DEL', STATE, PROMPT, TOKENS, SPECULATION, LOGPROBS)
return {'erased', fields}
