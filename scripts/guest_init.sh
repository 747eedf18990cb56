#!/bin/busybox sh
# /init of the initramfs that build_initramfs.py builds. Says on the console, for whoever watches it:
#   vvupipe-guest: ready SECONDS    modules are loaded, the script starts (SECONDS since the kernel started)
#   vvupipe-guest: exit N           the script ended with status N; the guest powers off
# Kernel parameters: vvupipe.script=BASE64. With the host's root also vvupipe.share=TAG:PATH (mount the 9p share TAG
# there, writable), vvupipe.env=NAME=VALUE (for the script), vvupipe.cwd=PATH, vvupipe.name=NAME (host name).
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /bin /sbin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/ TERM=${TERM:-linux}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
# Kernel messages in the middle of a marker line would hide it; warnings still get through.
dmesg -n 4

finish() {
    echo "vvupipe-guest: exit $1"
    sync
    poweroff -f
}

fail() {
    echo "vvupipe-guest: $*"
    finish 125
}

# A module's parameters, as kernel parameters MODULE.NAME=VALUE.
module_options() {
    name=${1##*/}
    name=${name%%.*}
    name=${name//-/_}
    for word in $(cat /proc/cmdline); do
        case "$word" in
        "$name".*=*) echo "${word#*.}" ;;
        esac
    done
}

while read -r need path; do
    # shellcheck disable=SC2046
    if ! insmod "/modules/$path" $(module_options "$path") 2>/tmp/insmod && [ "$need" = required ]; then
        fail "cannot load $path: $(cat /tmp/insmod)"
    fi
done </etc/guest/modules

# The value of each kernel parameter vvupipe.$1=VALUE, a line each.
parameters() {
    for word in $(cat /proc/cmdline); do
        case "$word" in
        vvupipe."$1"=*) echo "${word#*=}" ;;
        esac
    done
}

for encoded in $(parameters script); do
    echo "$encoded" | base64 -d >/etc/guest/script
done

if [ -e /etc/guest/host_root_init.sh ]; then
    . /etc/guest/host_root_init.sh
fi

read -r seconds rest </proc/uptime
echo "vvupipe-guest: ready $seconds"
if [ -e /etc/guest/host_root_init.sh ]; then
    enter_host_root
elif [ -e /etc/guest/script ]; then
    sh /etc/guest/script
else
    echo "A shell; 'exit' or Ctrl-D powers off. /dev/vda is the first virtual disk."
    setsid cttyhack sh
fi
finish $?
