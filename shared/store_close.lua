-- End or detach a session; one that has finished stays so. ARGV: life, status, reason, epoch or ''.
-- Returns {'closed' | 'stale' | 'missing', record}; stale: the session has been resumed by another gateway since.
local status, finish_reason, driven_since =
  unpack(redis.call('HMGET', STATE, 'status', 'finish_reason', 'driven_since'))
if not status then
  return {'missing', {}}
end
if ARGV[4] ~= '' and tonumber(ARGV[4]) < tonumber(driven_since) then
  return {'stale', record()}
end
if status == 'open' or (status == 'detached' and ARGV[2] == 'closed') then
  redis.call('HSET', STATE, 'status', ARGV[2], 'close_reason', ARGV[3], 'touched_ms', now_ms())
  if ARGV[2] == 'closed' then
    redis.call('HSET', STATE, 'finish_reason', 'cancelled', 'owner', '')
  end
  redis.call('DEL', SPECULATION)
end
refresh()
return {'closed', record()}
