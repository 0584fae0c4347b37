-- A verifier process takes a session's KV upon itself. ARGV: life, epoch, owner.
-- Returns {'kept' | 'taken' | 'stale' | 'missing' | 'damaged', record, prompt, tokens, log-probabilities}; taken: from another owner, and
-- the epoch has grown by one. A session that has ended is shown, but not owned.
local stored, owner, base, prompt_length, finish_reason, taken_from =
  unpack(redis.call('HMGET', STATE, 'epoch', 'owner', 'base', 'prompt_length', 'finish_reason', 'taken_from'))
if not stored then
  return {'missing', {}}
end
local epoch = tonumber(stored)
local asked = tonumber(ARGV[2])
local taken = owner == ARGV[3] and taken_from == ARGV[2] and epoch == asked + 1 -- the answer was lost
if asked < epoch and not taken then
  return {'stale', record()}
end
if redis.call('STRLEN', TOKENS) ~= base * TOKEN_BYTES
  or redis.call('STRLEN', PROMPT) ~= prompt_length * TOKEN_BYTES then
  return {'damaged', record()}
end
if finish_reason == '' and not taken then
  epoch = math.max(epoch, asked)
  if owner ~= '' and owner ~= ARGV[3] then
    epoch = epoch + 1
    taken = true
    redis.call('HSET', STATE, 'taken_from', ARGV[2])
  end
  redis.call('HSET', STATE, 'epoch', epoch, 'owner', ARGV[3], 'claimed_epoch', epoch, 'touched_ms', now_ms())
end
refresh()
return {taken and 'taken' or 'kept', record(), redis.call('GET', PROMPT), redis.call('GET', TOKENS) or '',
  redis.call('LRANGE', LOGPROBS, 0, -1)}
