-- Place a session anew: the epoch grows by one.
-- ARGV: life, request, expected epoch or '', '1' to reopen, verifier, partition, gateway or '', reply partition.
-- Returns {'placed' | 'repeated' | 'stale' | 'missing', record}: repeated when `request` was the last to place it.
local epoch, status, partition, placed_by =
  unpack(redis.call('HMGET', STATE, 'epoch', 'status', 'partition', 'placed_by'))
if not epoch then
  return {'missing', {}}
end
if placed_by == ARGV[2] then
  return {'repeated', record()}
end
if ARGV[3] ~= '' and ARGV[3] ~= epoch then
  return {'stale', record()}
end
local next_epoch = epoch + 1
redis.call('HSET', STATE, 'epoch', next_epoch, 'placed_by', ARGV[2], 'verifier', ARGV[5], 'partition', ARGV[6],
  'touched_ms', now_ms())
if partition ~= ARGV[6] then
  redis.call('HSET', STATE, 'owner', '') -- the KV stays behind
end
if ARGV[7] ~= '' then
  redis.call('HSET', STATE, 'gateway', ARGV[7], 'reply_partition', ARGV[8], 'driven_since', next_epoch)
end
if ARGV[4] == '1' and status == 'detached' then
  redis.call('HSET', STATE, 'status', 'open')
end
redis.call('DEL', SPECULATION)
refresh()
return {'placed', record()}
