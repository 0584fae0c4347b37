-- Open a session. ARGV: life, digest of the open, packed prompt, then the record's fields and values.
-- Returns {'created' | 'known' | 'taken', record}: known when this very open was made before.
local opened = redis.call('HGET', STATE, 'opened')
if opened then
  return {opened == ARGV[2] and 'known' or 'taken', record()}
end
local now = now_ms()
redis.call('DEL', STATE, TOKENS, SPECULATION, LOGPROBS)
redis.call('HSET', STATE, 'opened', ARGV[2], 'created_ms', now, 'touched_ms', now, unpack(ARGV, 4))
redis.call('SET', PROMPT, ARGV[3])
refresh()
return {'created', record()}
