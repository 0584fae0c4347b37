-- A verifier process has given a session's KV up. ARGV: life, epoch, owner. Returns 1 if it was still the owner; a
-- release from before its last claim changes nothing.
local owner, claimed_epoch = unpack(redis.call('HMGET', STATE, 'owner', 'claimed_epoch'))
if owner ~= ARGV[3] or tonumber(ARGV[2]) < tonumber(claimed_epoch) then
  return 0
end
redis.call('HSET', STATE, 'owner', '')
return 1
