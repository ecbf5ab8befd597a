# Connects to the Unix socket that is named first, sends the second argument, ends its half, and prints what comes.
use strict;
use Socket;
socket(my $socket, AF_UNIX, SOCK_STREAM, 0) or die "socket: $!";
connect($socket, pack_sockaddr_un(shift)) or die "connect: $!";
syswrite $socket, shift;
shutdown $socket, 1;
print while sysread $socket, $_, 65536;
