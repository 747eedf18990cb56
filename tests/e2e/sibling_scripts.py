"""What siblings do with their disk while a test looks on."""

TREE_SCRIPT = """
set -e
mke2fs /dev/vda >/dev/null
mount -t ext4 /dev/vda /mnt
cp -r /modules /etc /init /mnt
for i in $(seq 100); do echo "file $i" >/mnt/$i; done
sync
diff -r /modules /mnt/modules
echo "tree $(cd /mnt && find modules init -type f | sort | xargs sha256sum | sha256sum)"
umount /mnt
echo "disk $(sha256sum </dev/vda)"
"""

#: Bytes of each of COUNT_SCRIPT's writes.
COUNT_BYTES = 256 << 10

#: Writes blocks with their number in every byte, each flushed, and tells after each; then reads all of them.
COUNT_SCRIPT = f"""
block() {{
    tr '\\0' "\\\\$(printf %03o $1)" </dev/zero | head -c {COUNT_BYTES}
}}
for i in $(seq 24); do
    block $i >/tmp/data
    dd if=/tmp/data of=/dev/vda bs={COUNT_BYTES} seek=$i oflag=direct conv=notrunc,fsync 2>/dev/null || exit 9
    echo "flushed $i"
    sleep 0.2
done
for i in $(seq 24); do
    block $i >/tmp/data
    dd if=/dev/vda bs={COUNT_BYTES} skip=$i count=1 iflag=direct 2>/dev/null | cmp - /tmp/data || exit 10
done
"""
