-- Append a round's verdict if epoch and base are the session's own.
-- ARGV: life, epoch, round, base, packed tokens, finish reason or '', draft tokens, accepted ones, and
-- where they are told each token's log-probabilities.
-- Returns {'committed' | 'repeated', base}, {'missing'}, {'damaged', base}, or
-- {'conflict', epoch, base, finish reason, gateway, tokens since the base given}.
local epoch, stored, status, finish_reason, last_round, last_base, gateway, rounds, drafted, accepted =
  unpack(redis.call('HMGET', STATE, 'epoch', 'base', 'status', 'finish_reason', 'last_round', 'last_base', 'gateway',
    'rounds', 'drafted', 'accepted'))
if not epoch then
  return {'missing'}
end
local base = tonumber(ARGV[4])
local grown = base + #ARGV[5] / TOKEN_BYTES
if epoch == ARGV[2] then
  if last_round == ARGV[3] and last_base == ARGV[4] and tonumber(stored) == grown and finish_reason == ARGV[6]
    and (grown == base or redis.call('GETRANGE', TOKENS, base * TOKEN_BYTES, -1) == ARGV[5]) then
    refresh()
    return {'repeated', grown}
  end
  if stored == ARGV[4] and finish_reason == '' then
    if redis.call('STRLEN', TOKENS) ~= base * TOKEN_BYTES then
      return {'damaged', base}
    end
    redis.call('APPEND', TOKENS, ARGV[5])
    if #ARGV > 8 then
      redis.call('RPUSH', LOGPROBS, unpack(ARGV, 9))
    end
    redis.call('HSET', STATE, 'base', grown, 'last_round', ARGV[3], 'last_base', ARGV[4], 'finish_reason', ARGV[6],
      'status', ARGV[6] == '' and status or 'finished', 'rounds', rounds + 1, 'drafted', drafted + ARGV[7],
      'accepted', accepted + ARGV[8], 'touched_ms', now_ms())
    redis.call('DEL', SPECULATION)
    refresh()
    return {'committed', grown}
  end
end
return {'conflict', tonumber(epoch), tonumber(stored), finish_reason, gateway,
  redis.call('GETRANGE', TOKENS, base * TOKEN_BYTES, -1)}
