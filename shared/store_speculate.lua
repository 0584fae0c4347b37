-- Note what is in flight. ARGV: life, epoch, round, '1' to begin the round anew, then fields and values.
-- Returns 1, or 0 where the epoch or the round is another.
if redis.call('HGET', STATE, 'epoch') ~= ARGV[2] then
  return 0
end
if ARGV[4] == '1' then
  redis.call('DEL', SPECULATION)
  redis.call('HSET', SPECULATION, 'epoch', ARGV[2], 'round', ARGV[3])
elseif redis.call('HGET', SPECULATION, 'round') ~= ARGV[3] then
  return 0
end
redis.call('HSET', SPECULATION, unpack(ARGV, 5))
redis.call('PEXPIRE', SPECULATION, ARGV[1])
return 1
