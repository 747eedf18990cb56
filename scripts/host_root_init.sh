# Part of guest_init.sh: the host's root, by 9p and read-only, below a writable layer that is forgotten at the end.

share_options=trans=virtio,version=9p2000.L,msize=1048576
mkdir -p /host /layer /root
mount -t 9p -o "$share_options,cache=loose,ro" host /host 2>/tmp/mount ||
    fail "no 9p share 'host' (--shared-dir /:host:ro=true): $(cat /tmp/mount)"
mount -t tmpfs -o size=75% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /root ||
    fail "cannot lay a writable layer over the host's root"

# Nothing of the host's devices and running state is the guest's.
for folder in proc sys dev; do
    mount --bind "/$folder" "/root/$folder"
done
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts
mount -t tmpfs -o mode=1777 tmpfs /root/dev/shm
mount -t tmpfs -o mode=755 tmpfs /root/run
hostname "$(parameters name | tail -n 1)" 2>/dev/null
ip link set lo up

for share in $(parameters share); do
    mkdir -p "/root/${share#*:}"
    mount -t 9p -o "$share_options,cache=none" "${share%%:*}" "/root/${share#*:}" ||
        fail "no 9p share '${share%%:*}'"
done

enter_host_root() {
    set -- PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root "TERM=$TERM" LANG=C.UTF-8
    for setting in $(parameters env); do
        set -- "$@" "$setting"
    done
    folder=$(parameters cwd | tail -n 1)
    cp /bin/busybox /root/run/busybox
    [ -e /etc/guest/script ] && cp /etc/guest/script /root/run/vvupipe-script
    if [ -e /etc/guest/script ]; then
        env -i "$@" chroot /root /run/busybox sh -c "cd '${folder:-/}' && exec sh /run/vvupipe-script"
    else
        echo "A shell in the host's root, which is read-only: what is written goes away. 'exit' powers off."
        env -i "$@" chroot /root /run/busybox sh -c \
            "cd '${folder:-/}'; shell=/bin/bash; [ -x \$shell ] || shell=/bin/sh; exec /run/busybox setsid /run/busybox cttyhack \$shell"
    fi
}
