# Prints what inotify(7) tells of a directory: a line with the event's mask and name each.
use strict;
my ($directory) = @ARGV;
$| = 1;
my $fd = syscall 253;
# Changed, attributes, written and closed, made, deleted, moved.
syscall(254, $fd, $directory, 0x3ce) >= 0 or die "inotify_add_watch: $!";
open my $events, "<&=", $fd or die "open: $!";
print "watching\n";
while (sysread $events, my $bytes, 65536) {
    while (length $bytes) {
        my ($watch, $mask, $cookie, $length) = unpack "lLLL", $bytes;
        my $name = unpack "Z*", substr($bytes, 16, $length) . "\0";
        printf "%x %s\n", $mask, $name;
        $bytes = substr $bytes, 16 + $length;
    }
}
