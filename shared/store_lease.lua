-- A lease: one holder at a time, until it lapses. KEYS: the lease. ARGV: 'acquire' | 'renew' | 'free', holder, life.
-- Returns 1 if the step was taken.
local holder = redis.call('GET', KEYS[1])
if ARGV[1] == 'acquire' and not holder then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  return 1
end
if holder ~= ARGV[2] then
  return 0
end
if ARGV[1] == 'free' then
  redis.call('DEL', KEYS[1])
else
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return 1
