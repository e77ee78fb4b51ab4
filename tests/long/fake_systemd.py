"""A stand-in for `systemctl --user`, for boards without systemd: one unit, started and ended as a process in the background."""

# What `systemctl --user` does with the one unit there is.
SYSTEMCTL = """
shift
unit=$HOME/.config/systemd/user/edgesafe.service
end() { [ ! -e $HOME/pid ] || kill $(cat $HOME/pid) 2>/dev/null; rm -f $HOME/pid; }
case $1 in
restart)
    end
    echo "restarted $(readlink $HOME/edgesafe-service/current)" >> $HOME/log
    words=$(sed -n "s|^ExecStart=||p" $unit | sed "s|%h|$HOME|g")
    $words < /dev/null > $HOME/out 2>&1 &
    echo $! > $HOME/pid ;;
stop|disable) end ;;
is-active) kill -0 $(cat $HOME/pid) 2>/dev/null && echo active || echo inactive ;;
esac
"""
