use strict; use Fcntl qw(:DEFAULT :flock :seek);
my $dir = shift; chdir $dir or die "chdir $dir: $!";
$| = 1;
sub say_ { print "$_[0]: $_[1]\n" }
sub xset { my ($f,$n,$v)=@_; syscall(188,$f,$n,$v,length $v,0)==0 ? "ok" : "$!" }
sub xget { my ($f,$n)=@_; my $b="\0"x256; my $r=syscall(191,$f,$n,$b,256); $r<0 ? "$!" : substr($b,0,$r) }
open(my $f,">","f") or die; print $f "hello"; close $f;
say_("mode", (chmod(04751,"f"), sprintf("%o",(stat "f")[2]&07777))[1]);
say_("owner", (chown(1234,2345,"f"), join(":",(stat "f")[4,5]))[1]);
say_("link", (link("f","g"), (stat "f")[3], (stat "f")[1]==(stat "g")[1])[1]);
say_("user xattr", xset("f","user.x","v").xget("f","user.x"));
say_("trusted xattr", xset("f","trusted.x","v").xget("f","trusted.x"));
say_("capability", xset("f","security.capability",pack("VVVVV",0x02000000,1<<10,0,0,0)).length xget("f","security.capability"));
# locks
open(my $l,"+>","lock") or die; flock($l,LOCK_EX) or print "flock: $!\n";
say_("flock", do { my $p=open(my $k,"-|"); if(!$p){ open(my $m,"+<","lock"); print flock($m,LOCK_EX|LOCK_NB)?"taken":"held"; exit } local $/; <$k> });
my $fl=pack("s s x4 q q i x4",F_WRLCK,SEEK_SET,0,10,0);
fcntl($l,F_SETLK,$fl) or print "posix lock: $!\n";
say_("posix lock", do { my $p=open(my $k,"-|"); if(!$p){ open(my $m,"+<","lock"); my $g=pack("s s x4 q q i x4",F_WRLCK,SEEK_SET,5,10,0); print fcntl($m,F_SETLK,$g)?"taken":"held"; exit } local $/; <$k> });
say_("ofd lock", do { open(my $m,"+<","lock"); my $g=pack("s s x4 q q i x4",F_WRLCK,SEEK_SET,100,10,0); open(my $n,"+<","lock"); fcntl($m,37,$g) ? do { my $h=pack("s s x4 q q i x4",F_WRLCK,SEEK_SET,100,10,0); fcntl($n,37,$h)?"taken":"held" } : "$!" });
# sparse
sysopen(my $s,"sparse",O_RDWR|O_CREAT) or die; sysseek($s,1<<20,0); syswrite($s,"x"x4096); truncate($s,4<<20);
say_("sparse", ((stat $s)[12]*512 < 1<<20) ? "sparse" : "full");
say_("seek_data", sysseek($s,0,3)); say_("seek_hole", sysseek($s,1<<20,4));
say_("punch", syscall(285,fileno $s,3,1<<20,4096)==0 ? "ok" : "$!");
say_("punched", sysseek($s,0,3)//"no data: $!");
say_("fallocate", syscall(285,fileno $s,0,0,1<<20)==0 ? (stat $s)[12]*512>=1<<20 : "$!");
# mmap shared between two processes
sysopen(my $m,"map",O_RDWR|O_CREAT); truncate $m,4096;
my $a=syscall(9,0,4096,3,1,fileno $m,0);
say_("mmap", $a==-1 ? "$!" : do { my $p=fork; if(!$p){ syscall(0+0,0,0,0) if 0; open(my $o,"<","five"); sysopen(my $i,"five",O_RDWR|O_CREAT); syswrite($i,"world"); sysseek($i,0,0); syscall(0,fileno $i,$a+0,5) ; exit } waitpid $p,0; open(my $r,"<","map"); read $r,my $b,5; $b });
syscall(26,$a,4096,4);
say_("rename", (rename("g","h") && -e "h") ? "ok":"$!");
say_("exchange", do{my($p,$q)=("f","h"); syscall(316,-100,$p,-100,$q,2)}==0?"ok":"$!");
say_("symlink", (symlink("f","sl"), readlink "sl")[1]);
say_("mkfifo", do{my $n="fifo";$n}&&syscall(133,my $nmfifo="fifo",0010644,0)==0 && -p "fifo" ? "ok":"$!");
say_("mknod", do{my $n="null";$n}&&syscall(133,my $nmnull="null",0020666,1*256+3)==0 && -c "null" ? "ok":"$!");
use Socket; socket(my $so,AF_UNIX,SOCK_STREAM,0); say_("unix socket", bind($so,pack_sockaddr_un("sock")) ? "ok":"$!");
listen $so,1; socket(my $c,AF_UNIX,SOCK_STREAM,0); say_("connect", connect($c,pack_sockaddr_un("sock"))?"ok":"$!");
say_("unlinked", do { open(my $u,"+>","gone"); unlink "gone"; syswrite $u,"abc"; sysseek $u,0,0; sysread $u,my $b,9; "$b ".((stat $u)[3]) });
say_("direct", sysopen(my $d,"direct",O_RDWR|O_CREAT|040000)?"ok":"$!");
say_("atime", do { utime 1000,2000.5,"f"; join ",",(stat "f")[8,9] });
say_("statfs", do { my $b="\0"x120; syscall(137,my $dot=".",$b)==0?"ok":"$!" });
say_("suid cleared", do { open(my $x,">","su"); close $x; chown 1000,1000,"su"; chmod 06755,"su"; my $p=fork; if(!$p){ $)="1000 1000";$>=1000; open(my $y,">>","su"); print $y "x"; close $y; exit } waitpid $p,0; sprintf "%o",(stat "su")[2]&07777 });
say_("copy_file_range", do { sysopen(my $a,"h",O_RDONLY); sysopen(my $b,"cfr",O_RDWR|O_CREAT); my $r=syscall(326,fileno $a,0,fileno $b,0,5,0); $r });
